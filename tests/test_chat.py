"""Notebooks 05b, 05c and 06: which messages show a notice (the examples came before the
phrases), and the chat without a browser."""

import threading
import time

import grpodx_utils as gx
import numpy as np
import pytest

six, flags, talks = (gx.notebook(n) for n in ("06", "05b", "05c"))

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
i dont wanna be here anymore
Nobody would even notice if I was gone
I just want to go to sleep and never wake up
I keep having thoughts about ending my life
I've thought about killing myself a few times
My daughter says she wants to die
I want the pain to stop and I see no way out except dying
i feel like theres no hope and im a burden to everyone
I have a plan to kill myself
I've got pills and I am thinking of taking them all
I cant keep going
Im sick of being alive
i hate being alive
I don't see any reason to keep living
i self harm
I burn myself when I am sad
what's the easiest way to die
How many paracetamol does it take to die
no I don't want help I want to die
I am not okay. I want to kil myslef
I WANNA DIE!!!
I don't have the strength to live
I don't deserve to live
I wouldn't mind not waking up
I am thinking about suiciding
I want 2 die
im gonna end it tonight
I feel like hurting myself
I’m scared I might do something to myself
no fever. suicidal thoughts though
Sometimes I wish I could just not exist
life is not worth it anymore
I do not see a future for myself
I want to be with my dead wife
Ive been thinking of ways to end things
I wish someone would shoot me
I can't carry on
I'm thinking about jumping off the roof
I've been cutting again
I am better off dead
My husband tried to kill himself yesterday
Since my divorce I don’t want to exist
why am i even alive
Whats the point of being alive
I’d rather be dead than live like this
I am at the end of my rope, I want out of this life
sometimes I think it would be easier if I just died
My wife keeps saying she'll take her own life
I do not want to be alive any longer
I dont have any reason left to live
I bought a rope to hang myself
I have no desire to live
My teenage son has been harming himself
I WANT TO KILL MY SELF
i wnat to die
suiside is on my mind
I have suicdal thoughts
i am not going to make it through the night, i want to end it all
I drank too much so I could die
Please help me, I don't want to hurt myself but I can't stop the thoughts
I don't want to die but I keep thinking about overdosing
no one cares if i die
i have been so low that i thought about hanging myself
there's just no point in being alive anymore
I can't see myself living much longer, I'd rather not be here
Sometimes i imagine driving into a wall
I want to put an end to my life
I wish God would take me
Im thinkng of killing myself
yesterday I wrote a suicide note
I don't want to continue
I've lost the will to live
my brother is suicidal
would anyone miss me if i died
I don't think I can live like this any more
I keep cutting my arms
DONT WANT TO LIVE
nothing matters and I want to be dead
I won't be here tomorrow
im scared i will kill myself
I can’t do this anymore
I don't care whether I live or die
"""

# Doubtful ones get the notice: it is calm, and a miss would cost more.
DOUBTFUL = """
I wouldn't say I'm suicidal
I am not suicidal today
I don't want to kill myself yet
my uncle committed suicide last year
I hate my life
My doctor asked whether I was suicidal and I said no
"""

BOTH = """
I took all my pills
i overdosed on paracetamol
I swallowed a whole bottle of sleeping tablets
I've taken an overdose
I took too many pills
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
I can barely breathe
I'm having trouble breathing and my chest feels heavy like an elephant sits on it
HELP he is not breathing
My wife collapsed and is not responding
my chest hurts really bad and it spreads to my jaw
I have a sudden severe headache, the worst ever
There is blood everywhere, it doesn't stop
I coughed up some blood
i threw up blood
I vomit something like coffee grounds
I can't feel the left side of my body
my words come out slurred
my mouth is drooping on one side
I keep passing out
Im about to pass out
My daughter is having a seizure
a wasp stung me and my throat is swelling
my toddler swallowed a button battery
sudden chest pain and sweating
Yes, and also a crushing pain in my chest
I dont have a fever but i cant breathe
I can't swallow my saliva
I lost control of my bladder and my legs are numb
I had a fit this morning and bit my tongue
I can’t see anything in my right eye since an hour ago
someone stabbed me
my stool is black like tar
stiff neck and high fever
i feel short of breath even at rest
my chest feels like it is being crushed
I cant get air
Im bleeding and cannot stop it
he is choking on food
I got hit by a car
My arm and face went numb all of a sudden
I have a terrible headache that came like a thunderclap
I've been unconscious for a minute
I was out cold for a few seconds
im having a heartattack
I think I am having an allergic reaction, my lips are swollen and I can't breathe
I've been bringing up blood
i have black tarry stools
My heart is racing and I nearly fainted and my chest hurts
I fell off a ladder and hit my head
rash that doesn't fade when pressed and a stiff neck
blood in my vomit
I cannot pass urine at all
there's a lot of blood in my stool and I feel faint
he drank some bleach
I have trouble speaking since this morning and my right arm is weak
chest pain at rest
Chest pain.
CONFUSED AND FEVER
my throat is swelling shut
can't breath properly
i cant breathe at all
I just fainted
my son is choking on a grape
she's not responding
My tongue is swollen and I can hardly breathe
terrible pressure on my chest and cold sweat
I feel a tearing pain in my back
my left arm is weak since this morning
I can't speak properly, my speech is slurred
my nose won't stop bleeding
had a convulsion an hour ago
I am coughing up a lot of blood
I have pain in the chest
belly is hard as a board and the pain is severe
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
I never think about suicide
No, I am not thinking of hurting myself
I don't feel like killing myself
i would never kill myself
I don't want to hurt myself or anybody else
I love my life
I want to live long
my knee is killing me
I nearly died laughing
I can't go on holiday because of my cough
No difficulty breathing
I have no trouble breathing and no chest pain
I've not coughed up any blood
not coughing blood
never had a seizure
My uncle had a stroke last year
My aunt died of a heart attack
my grandmother fainted yesterday
My wife had a seizure when she was young
I haven't fainted or passed out
I don't have any numbness, weakness or slurred speech
My stool isn't black
I have a mild headache, not the worst
I have a sore throat and a runny nose
I can't sleep
I can't eat anything spicy
I can't smell
I lost my sense of taste
My skin itches at night
I lost weight
My legs are tired
I feel tired all the time
I feel low and sad
my face is red
I have burning when I pee
I shot a film last week
I am choked up with emotion
It hurts when I breathe through a blocked nose
the pain does not stop me from working
my vision is fine
I want to end the treatment
I have lived here all my life
I hit my toe on a chair
I take pills for my blood pressure
my child has a cough
I am allergic to nuts
Nobody in my family had a heart attack
My son had a fit when he was two
I do not have black stool
I don't pass out
There's no blood in my vomit
no chest pain or shortness of breath
I don't have any chest pain, just a cough
Apart from a runny nose I'm fine
I have never harmed myself
I don't have any plans to end my life
I'm not thinking about suicide
not suicidal at all
No I do not want to die
I never had suicidal thoughts
My life is good
I wanted to dye my hair and got a rash
my plants keep dying
Deadlines at work are killing me
I could have died of embarrassment
I've had this cough for so long
I live alone
I can't live without coffee
I hate living in the city
I have no reason to worry
The doctor took all my blood pressure readings
I take all my medicine
it hurts when I cut my nails
I burned myself on the stove
I can't stop sneezing
I can't stop scratching
I'm short of breath when I run
My eyes are red and itchy
I have a stomach ache after fatty food
I feel worse at night
I ended up in bed with a fever
I need it to end soon, this cough
There is no way I can eat
i can breath ok
I feel fine now
My cough won't go away
I don't cough up blood, only yellow stuff
My friend passed out at a party
I had a stroke 20 years ago
I am not coughing blood and I have not fainted
my chest is fine
There is no pain in the chest
I would not hurt myself
I've never been suicidal in my life
I don't think about death
I have not thought of ending my life
I have dry eyes
I've been tired since Monday
My husband snores
I want to know why I itch
I can't stand the smell
I am sick of this rash
I can't take this medicine anymore because it makes me sick
I would rather stay at home
I'm living in a small flat
I feel better when I am outside
I wish I could sleep
no reason to worry about my heart
"""


def lines(text):
    return [line for line in text.splitlines() if line]


TEXTS = dict(CRISIS=CRISIS, DOUBTFUL=DOUBTFUL, EMERGENCY=EMERGENCY, CALM=CALM)
EXAMPLES = [
    (message, kinds)
    for text, kinds in (
        (CRISIS, {"crisis"}),
        (DOUBTFUL, {"crisis"}),
        (BOTH, {"crisis", "emergency"}),
        (EMERGENCY, {"emergency"}),
        (CALM, set()),
    )
    for message in lines(text)
]


@pytest.fixture(scope="module")
def alarms(bank):
    return flags.load_alarms(bank)


@pytest.mark.parametrize("message, kinds", EXAMPLES)
def test_what_a_message_warns_of(bank, alarms, message, kinds):
    found = flags.read_alarms(bank, alarms, "", message)
    assert {kind for kind, reasons in found.items() if reasons} == kinds, found


def test_enough_examples_of_every_kind():
    counts = {name: len(lines(text)) for name, text in TEXTS.items()}
    assert len({m for m, _ in EXAMPLES}) == len(EXAMPLES)
    assert counts["CRISIS"] >= 60 and counts["EMERGENCY"] >= 60 and counts["CALM"] >= 60


@pytest.mark.parametrize(
    "question, answer, kind",
    [
        ("Have you had thoughts of hurting yourself?", "yes", "crisis"),
        ("Are you suicidal?", "Yes, often", "crisis"),
        ("Do you have any chest pain?", "yes", "emergency"),
        ("Have you fainted?", "yeah, twice", "emergency"),
        ("Have you had thoughts of hurting yourself?", "no", ""),
        ("Are you suicidal?", "No.", ""),
        ("Do you have any chest pain?", "nope", ""),
        ("Do you have a fever?", "yes", ""),
    ],
)
def test_an_answer_is_read_with_its_question(bank, alarms, question, answer, kind):
    found = flags.read_alarms(bank, alarms, question, answer)
    assert {k for k, reasons in found.items() if reasons} == {kind} - {""}


def test_every_listed_name_is_known(bank, alarms):
    """Lists that name findings or red flags must name existing ones."""
    assert set(alarms.lists["urgent"]) <= set(bank.symptoms)
    flags = {f for d in bank.diseases for f in d.red_flags}
    assert set(alarms.lists["not_alone"]) <= flags
    assert set(alarms.lists["notices"]) == {d.name for d in alarms.bank.diseases}


def test_every_red_flag_of_the_bank_warns_or_is_listed(bank, alarms):
    names = {f for d in bank.diseases for f in d.red_flags}
    read = {f: flags.read_alarms(bank, alarms, "", f"I have {f}") for f in names}
    silent = {f for f, found in read.items() if not found["emergency"]}
    crisis = {f for f, found in read.items() if found["crisis"]}
    assert silent <= set(alarms.lists["not_alone"])
    assert crisis == {f for f in names if "suicide" in f}


def test_the_dangers_do_not_depend_on_the_bank(bank):
    """An own bank without red flags still warns of the file's dangers."""
    names = ("Common cold", "Influenza", "Migraine")
    few = [bank[n]._replace(red_flags=()) for n in names]
    small = gx.Bank(few, bank.lexicon)
    alarms = flags.load_alarms(small)
    for message in ("I can't breathe", "a crushing chest pain", "I passed out"):
        assert flags.read_alarms(small, alarms, "", message)["emergency"], message
    assert flags.read_alarms(small, alarms, "", "I want to die")["crisis"]
    assert not flags.read_alarms(small, alarms, "", "confusion")["emergency"]


def test_a_message_without_words_is_no_alarm(bank, alarms):
    for message in ("", "...", "??", "🙂", "\n", "’"):
        assert flags.read_alarms(bank, alarms, "", message) == {
            "crisis": [],
            "emergency": [],
        }


def test_one_typing_error_but_no_other_small_word():
    assert flags.sounds_like(["kill"], "kil", set())
    assert flags.sounds_like(["cant"], "can", set())
    assert not flags.sounds_like(["cant"], "can", {"can"})
    assert not flags.sounds_like(["die"], "diet", set())
    assert not flags.sounds_like(["myself"], "yourself", set())


@pytest.fixture
def window(bank, alarms):
    """A window with a doctor that asks the same, and an even belief."""
    setup = talks.ChatSetup(bank, alarms, Parrot())
    return six.ChatWindow(setup, lambda talk: np.full(len(bank.names), 0.01))


class Parrot:
    """A doctor that always asks the same, a word at a time; `pause` holds it up."""

    said, watch = "Do you have a fever?", None

    def __init__(self):
        self.pause = threading.Event()
        self.pause.set()

    def __call__(self, open_talks):
        for word in self.said.split():
            self.pause.wait(20)
            if self.watch:
                self.watch([f" {word}"])
        return [self.said] * len(open_talks)


def type_in(window, message):
    window.box.value = f"{message}\n"
    window.wait()


def press(window, name):
    window.buttons[name].click()
    window.wait()


def who_spoke(window):
    return [who for who, *_ in window.state.lines]


def test_only_a_line_break_or_send_sends(window):
    window.box.value = "I have a headache"
    window.reasoning.value = True
    assert window.box.value == "I have a headache" and len(window.state.lines) == 1
    type_in(window, window.box.value)
    assert window.box.value == "" and len(window.state.lines) == 3
    window.box.value = "no"
    press(window, "Send")
    assert who_spoke(window)[1:] == ["you", "doctor"] * 2
    type_in(window, " ")  # only Enter
    press(window, "Send")
    assert window.box.value == "" and len(window.state.lines) == 5


def test_alarms_stay_until_a_new_patient(window):
    for message in ("I want to die and I have a headache", "no"):
        type_in(window, message)
    assert "988" in window.notice.value and "116 123" in window.notice.value
    assert "This can be an emergency" not in window.notice.value
    type_in(window, "and I cough up <b>blood</b>")
    assert window.notice.value.index("988") < window.notice.value.index(
        "emergency.</b>"
    )
    press(window, "New patient")
    assert window.notice.value == "" and window.state == talks.ChatState()


def test_a_crisis_is_not_answered_with_a_misunderstanding(window):
    type_in(window, "I want to die")
    assert window.state.lines[-1][1] == talks.ONLY_A_PROGRAM
    type_in(window, "trains are nice")
    assert window.state.lines[-1][1] == talks.SORRY


def test_a_crisis_in_the_middle_is_not_answered_with_a_question(window):
    type_in(window, "I have a headache")
    asked = window.state.talk.spoken[-1]
    type_in(window, "no, and I want to kill myself")
    assert window.state.lines[-1][1] == talks.ONLY_A_PROGRAM
    assert "not alone" in window.notice.value
    type_in(window, "no")  # the talk goes on where it was
    assert window.state.talk.spoken[0] == asked and len(window.state.talk.replies) == 1


def test_what_is_typed_is_escaped(window):
    type_in(window, "I have a headache <script>alert(1)</script>")
    assert (
        "<script>" not in window.lines.value and "&lt;script&gt;" in window.lines.value
    )


def test_an_emergency_stops_the_talk_until_it_is_confirmed(window):
    confirm = window.buttons["I have read this, go on"]
    assert confirm.layout.display == "none"
    type_in(window, "I have a crushing chest pain")
    assert who_spoke(window) == ["doctor", "you"] and confirm.layout.display == ""
    assert window.buttons["Send"].disabled and "emergency.</b>" in window.notice.value
    type_in(window, "no")  # not taken, not lost
    assert window.box.value == "no\n" and who_spoke(window) == ["doctor", "you"]
    window.box.value = ""
    confirm.click()
    window.wait()
    assert who_spoke(window) == ["doctor", "you", "doctor"]
    type_in(window, "no")  # the same alarm does not stop it again
    assert len(window.state.lines) == 5 and "emergency.</b>" in window.notice.value


def test_one_press_answers_and_undo(window):
    assert window.buttons["Yes"].layout.display == "none"
    press(window, six.EXAMPLES[0])
    first = window.state.talk.ids, window.state.lines
    press(window, "Yes")
    assert (
        window.state.talk.evidence["fever"] is True and "2 of" in window.progress.value
    )
    press(window, "Undo")
    assert "fever" not in window.state.talk.evidence
    assert (window.state.talk.ids, window.state.lines) == first
    press(window, "No")
    assert window.state.talk.evidence["fever"] is False
    for _ in range(2):
        press(window, "Undo")
    assert window.state == talks.ChatState() and window.buttons["Undo"].disabled
    type_in(window, "I have a headache and I want to die")
    press(window, "Undo")
    assert "988" in window.notice.value  # a crisis is not taken back


def test_a_long_talk_ends_with_a_card(bank, window):
    doctor = window.setup.doctor
    press(window, "My skin is itchy.")
    for name in ("No", "Not sure", "Yes"):
        press(window, name)
    doctor.said = "Final diagnosis: Scabies"
    press(window, "No")
    assert "The end" in window.progress.value and window.box.disabled
    for words in ("<b>Scabies</b>", "for it: itching", "else: ", "Not medical advice"):
        assert words in window.lines.value, words
    press(window, "Undo")  # even the last answer
    assert not window.box.disabled and "<b>Scabies</b>" not in window.lines.value


def test_what_a_finding_adds(bank):
    evidence = {"itching": True, "fever": False}
    told = talks.weigh_evidence(bank, evidence, "Scabies")
    two, column = gx.notebook("02"), bank.index["Scabies"]
    p = two.belief(bank, [evidence, {"fever": False}])[:, column]
    doublings = np.diff(np.log2(p / (1 - p)))[0]
    assert told[0][1:] == ("itching", True) and np.isclose(told[0][0], -doublings)


@pytest.fixture
def slow(bank, alarms):
    """A window whose doctor waits until `pause` is set."""
    setup = talks.ChatSetup(bank, alarms, Parrot())
    window = six.ChatWindow(setup, None, own_belief=False)
    window.setup.doctor.pause.clear()
    yield window
    window.setup.doctor.pause.set()
    window.wait()


def test_words_appear_as_they_are_said(slow):
    seen, old = [], six.draw_lines
    slow.lines.observe(lambda change: seen.append(change["new"]), "value")
    slow.box.value = "I have a headache\n"
    assert slow.buttons["Send"].disabled and not slow.buttons["Stop"].layout.display
    slow.setup.doctor.pause.set()
    slow.wait()
    assert any("Do you have …" in text for text in seen)
    assert "Do you have a fever?" in seen[-1] and "…" not in seen[-1]
    assert not slow.buttons["Send"].disabled and slow.buttons["Stop"].layout.display
    assert slow.setup.doctor.watch is None and old is six.draw_lines


def test_stop_gives_the_message_back(slow):
    slow.setup.doctor.pause.set()
    type_in(slow, "I have a headache")
    before = slow.state.lines
    slow.setup.doctor.pause.clear()
    slow.box.value = "no, my head only\n"
    slow.buttons["Stop"].click()
    slow.setup.doctor.pause.set()
    slow.wait()
    assert slow.box.value == "no, my head only" and slow.state.lines == before
    press(slow, "Send")
    assert len(slow.state.lines) == len(before) + 2
    assert len(slow.state.talk.replies) == 1


def test_many_clicks_send_once(slow):
    slow.box.value = "I have a headache"
    for _ in range(50):
        slow.buttons["Send"].click()
    slow.box.value = "no\n"  # typed while the doctor speaks: sent afterwards
    for name in ("New patient", "Undo", "Yes"):
        slow.buttons[name].click()
    slow.setup.doctor.pause.set()
    for _ in range(200):
        slow.wait()
        if len(slow.state.lines) == 5:
            break
        time.sleep(0.02)
    said = [text for who, text, _ in slow.state.lines if who == "you"]
    assert said == ["I have a headache", "no"] and slow.box.value == ""


def test_a_doctor_that_fails_loses_nothing(window, monkeypatch):
    shown = []
    monkeypatch.setattr(threading, "excepthook", lambda args: shown.append(args))
    type_in(window, "I have a headache")
    before = window.state.lines
    monkeypatch.setattr(Parrot, "__call__", lambda *_: 1 / 0)
    type_in(window, "no")
    assert window.box.value == "no" and window.state.lines == before
    assert shown[0].exc_type is ZeroDivisionError  # and it is told


STROKE = ("facial droop", "slurred speech", "one-sided weakness")


def test_a_likely_emergency_warns(bank):
    evidence = dict.fromkeys(STROKE, True)
    assert flags.likely_emergencies(bank, evidence) == ["Stroke is likely"]
    assert flags.likely_emergencies(bank, {"itching": True}) == []
