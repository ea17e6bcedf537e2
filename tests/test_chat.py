"""Notebook 06: which messages show a notice. The examples came before the phrases."""

import grpodx_utils as gx
import pytest

six = gx.notebook("06")

CRISIS = """
I want to end my life
i wanna kill myself
I WANT TO DIE
I don’t want to live any more
I dont want to live anymore
there is no reason to live
I've been thinking about hurting myself
thinking of suicide a lot
I feel suicidal
i am suicidl
maybe I should just kill myself
I might hurt myself tonight
I am going to kil myself
I can't stop thinking about killing myself
everyone would be better off without me
My family would be better off if I was dead
I wish I was dead
I wish I'd never been born
I just want it all to be over
life isn't worth living
I dont see the point in living
no one would care if I killed myself
I don't know if I want to be alive
I haven't slept and want to die
I'm not joking, I want to die
I have no choice but to end it all
i tried to kill myself last year
I have been cutting myself
self-harm is the only thing that helps
I don't want to wake up tomorrow
my son says he wants to kill himself
i want to take my own life
Im going to jump off a bridge
why shouldn't I kill myself
no, but sometimes I think about ending it
Not right now, but last week I wanted to die.
goodbye everyone i cant go on
"""

BOTH = """
I took all my pills
i overdosed on paracetamol
I swallowed a whole bottle of sleeping tablets
I've taken an overdose
"""

EMERGENCY = """
I can't breathe
I CANT BREATH
i can not breathe
I’m struggling to breathe
my throat is closing up
I'm choking
I passed out this morning
I blacked out twice
my baby isn't breathing
My son won't wake up
my husband is having a heart attack
it won't stop bleeding
the bleeding wont stop
worst headache of my life
I have the worst hedache of my life
a crushing chest pain
i have chest pain and my left arm hurts
No fever, but I have chest pain
I might be having a stroke
half my face is drooping
I suddenly can't move my arm
I cough up blood
i am vomiting blood
My speech is slurred
I've had a stiff neck with a fever since last night
my lips are turning blue
I had a seizure today
sudden loss of vision in one eye
My mother had a stroke, and now I have slurred speech
I swallowed bleach
my tongue is swelling
i fell and hit my head hard and feel confused
"""

CALM = """
I don't have chest pain
no chest pain
I dont have chest pain or trouble breathing
No, no chest pain, no fainting and no blood when I cough
My mother had a stroke and slurred speech
my father killed the engine
I have never passed out
I can breathe fine
I have a headache
I have an itchy skin
I have had a cough for three days
My dad had a heart attack ten years ago
years ago I had a seizure
I used to faint as a child
my stool is brown, not black
I haven't lost any weight
No bleeding
nothing is bleeding
my neck is not stiff
My nose was bleeding yesterday but it stopped
I deny chest pain, seizures and confusion
I am not confused
my lips are dry
I'm breathless when I climb stairs
I'm not suicidal
im not suicidal
I don't want to die
I do not want to kill myself
No thoughts of suicide or self-harm
I have never thought about killing myself
I want to live
I'd never hurt myself
I'm not going to hurt myself
this headache is killing me
my back is killing me
I hurt myself playing football
I cut myself shaving
I want to lose weight
I want to diet
I could kill for a coffee
I worked myself to death this week
that cake was to die for
The pain comes at the end of the day
I lead a busy life
my phone died
I took all my pills as prescribed
Can I die from this?
I am afraid of dying
I’m living with my wife
My life has been stressful lately
I take my medicine every morning
no
yes
"""


def lines(text):
    return [line for line in text.splitlines() if line]


EXAMPLES = [
    (message, kinds)
    for text, kinds in (
        (CRISIS, {"crisis"}),
        (BOTH, {"crisis", "emergency"}),
        (EMERGENCY, {"emergency"}),
        (CALM, set()),
    )
    for message in lines(text)
]


@pytest.fixture(scope="module")
def alarms(bank):
    return six.load_alarms(bank)


@pytest.mark.parametrize("message, kinds", EXAMPLES)
def test_what_a_message_warns_of(bank, alarms, message, kinds):
    found = six.read_alarms(bank, alarms, "", message)
    assert {kind for kind, reasons in found.items() if reasons} == kinds, found
