"""The world that a doctor lives in: what all GRPODx notebooks share.

    disease bank -> case -> patient -> consultation -> play -> rewards -> evaluation

Plain Python and numpy, in the order of the data flow. The model's side (tokens,
rollout, advantages, judges) stands in the notebook that teaches it; see `notebook`.
A *finding* is a symptom that a patient has; *evidence* maps symptoms to True or False
as the patient said; an *episode* is one finished consultation.
"""

from __future__ import annotations

import json
import linecache
import os
import re
import sys
import unicodedata
import zlib
from collections import Counter, defaultdict, namedtuple
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile
from types import ModuleType
from typing import Any

import numpy as np
from jsonschema import Draft202012Validator, validators
from jsonschema.exceptions import best_match
from rapidfuzz import process
from rapidfuzz.distance import OSA
from scipy.stats import binomtest
from tqdm.auto import tqdm

DATA = Path(__file__).resolve().parent / "data"
SMOKE = os.environ.get("GRPODX_SMOKE") == "1"  # same code, small sizes: for tests
MAX_QUESTIONS, _MAX_REPLY = 5, 2_000  # questions; characters of a reply
# Colours that stay apart for colour-blind readers (Okabe and Ito, 2008).
COLORS = dict(before="#999999", after="#0072B2", bayes="#009E73", random="#E69F00")
_ENGLISH = json.loads((DATA / "english.json").read_text("utf-8"))  # word lists
_PARTS = re.compile(rf"[,;.:?!–—]+|\b(?:{'|'.join(_ENGLISH['joins'])})\b")
_DENY = set(_ENGLISH["speech"]["deny"])
_SINCE = _ENGLISH["since"]  # onset -> what patients say
_SCHEMAS = json.loads((DATA / "schemas.json").read_text("utf-8"))  # for `_check`
# For libraries that notebooks import later. Threads that spin slow each other down.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


@lru_cache
def notebook(number: str) -> ModuleType:
    """The definitions of a notebook as a module: `gx.notebook("03").ModelDoctor`.

    Runs its cells tagged `definitions` (imports, functions, classes, constants), once
    and without a kernel. ValueError if there is no notebook of that number.
    """
    found = sorted((DATA.parent / "notebooks").glob(f"{number}_*.ipynb"))
    if len(found) != 1:
        raise ValueError(f"notebook {number!r}: no file notebooks/{number}_*.ipynb.")
    module = ModuleType(f"notebook_{number}", f"Definitions of {found[0].name}.")
    module.gx = sys.modules[__name__]
    sys.modules[module.__name__] = module  # dataclasses and pickle look it up there
    for i, cell in enumerate(json.loads(found[0].read_text("utf-8"))["cells"]):
        if "definitions" in cell["metadata"].get("tags", ()):
            source, where = "".join(cell["source"]), f"{found[0].name}, cell {i}"
            linecache.cache[where] = len(source), None, source.splitlines(True), where
            exec(compile(source, where, "exec", dont_inherit=True), module.__dict__)
    return module


# -------------------------------------------------------- 1. reading and checking files
class InputError(ValueError):
    """A file or parameter that cannot be used: where, what is wrong, and the mend."""


def read_json(path: str | Path, lines=False) -> Any:
    """The content of a JSON file, or of each of its `lines` as a list; an InputError
    that names file and line if broken."""
    try:
        text = Path(path).read_bytes()  # UTF-8 or 16, marked or not
        if lines:
            text = b"[" + text.strip().replace(b"\n", b",\n") + b"]"
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as e:
        what = f"line {e.lineno}, column {e.colno}: not valid JSON ({e.msg}). Often a"
        what += " comma or a quote is missing just before that place."
        what = what if text.strip() else "the file is empty. Restore it."
    except (OSError, ValueError, RecursionError) as e:
        what = f"cannot be read ({e}). Check the path, and that it is a text in UTF-8."
    raise InputError(f"{path}: {what}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for name, times in Counter(name for name, _ in pairs).items():
        if times > 1:
            raise ValueError(f"the key '{name}' comes twice in one object")
    return dict(pairs)


def _write(path: str | Path, text: str) -> Path:
    (path := Path(path)).parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _did_you_mean(word: Any, known: Sequence[str]) -> str:
    near = process.extractOne(str(word), list(known), score_cutoff=60)
    return f" Did you mean '{near[0]}'?" if near else ""


def _is_number(_, x: Any) -> bool:  # JSON's: no truth value, no infinity
    return type(x) in (int, float) and abs(x) <= sys.float_info.max


@lru_cache
def _checker(kind: str) -> Any:
    types = {"number": _is_number, "integer": lambda _, x: type(x) is int}
    types["array"] = lambda _, x: isinstance(x, list | tuple)
    strict = Draft202012Validator.TYPE_CHECKER.redefine_many(types)
    make = validators.extend(Draft202012Validator, type_checker=strict)
    return make({**_SCHEMAS[kind], "$defs": _SCHEMAS["$defs"]})


def _check(raw: Any, kind: str, where: str) -> Any:
    """`raw`, if it is as data/schemas.json wants this kind; else an InputError."""
    if (fault := best_match(_checker(kind).iter_errors(raw))) is None:
        return raw
    place = [key for key in fault.absolute_path if isinstance(key, str)]
    here = f"{where}: '{place[-1]}'" if place else where
    if fault.validator == "required":
        missing = [k for k in fault.validator_value if k not in fault.instance]
        raise InputError(f"{here} lacks {', '.join(missing)}. Add it.")
    if fault.validator == "additionalProperties":
        key = next(k for k in fault.instance if k not in fault.schema["properties"])
        mend = _did_you_mean(key, fault.schema["properties"])
        raise InputError(f"{here} has an unknown key '{key}'.{mend}")
    what = fault.schema["description"]
    raise InputError(f"{here}: {fault.instance!r:.60} is not {what}.")


def check_parameters(names: Mapping[str, Any]) -> None:
    """Checks a notebook's parameters (`globals()`) before work is done with them: that
    each is what data/schemas.json says, and that output folders can be written."""
    known = _SCHEMAS["parameters"]["properties"]
    given = _check(
        {n: names[n] for n in known if n in names}, "parameters", "Parameter"
    )
    for name in [n for n in given if n.endswith("_DIR")]:
        try:
            Path(given[name]).mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=given[name]).close()
        except OSError as e:
            what = f"{given[name]!r} cannot be written ({e.strerror})"
            raise InputError(
                f"Parameter: '{name}': {what}. Give another folder."
            ) from e


# ------------------------------------------------------------ 2. words to symptoms (02)
def words(text: str) -> list[str]:
    """Lower-case words of `text` without accents, apostrophes and punctuation."""
    plain = unicodedata.normalize("NFKD", text.casefold().replace("’", "'"))
    plain = "".join(c for c in plain if not unicodedata.combining(c)).replace("'", "")
    return re.findall(r"[a-z0-9]+", plain)


@lru_cache(4096)
def _key(text: str) -> str:
    return " ".join(words(text))


# How people talk about one symptom: what a doctor asks; how a patient opens with it;
# yes and no; other words for it; more general symptoms, not meant when this one is.
_WAYS = "name question complaint yes no ask kind_of"
Symptom = namedtuple("Symptom", _WAYS, defaults=((), ()))


class Lexicon:
    """All symptoms, and the map from free English to them.

    A phrase is found when all its content words stand close together, each as itself, a
    synonym, an inflection, or a typo.
    """

    def __init__(self, symptoms: list[Symptom], unknown=(), synonyms=()):
        self.symptoms = {s.name: s for s in symptoms}
        said = [(s, text) for s in symptoms for text in (s.yes, s.no, s.complaint)]
        self.sentences = {_key(text): (s.name, text != s.no) for s, text in said}
        self._own = {_key(s.question): (s.name,) for s in symptoms}
        self._head = head = {w: group[0] for group in synonyms for w in group}
        self._kinds = {"": ()} | {s.name: s.kind_of for s in symptoms}
        small, every = _ENGLISH["stop_words"], []  # every: (symptom, words of a phrase)
        for s in symptoms:
            every += [(s.name, words(p)) for p in (s.name, s.question, *s.ask)]
        every += [("", words(p)) for p in unknown]
        rows = [(n, [w for w in p if w not in small] or p) for n, p in every]
        rows = [(n, dict.fromkeys(p)) for n, p in rows]  # each word once
        self._vocabulary = sorted({w for _, p in rows for w in p} | head.keys())
        self._by_word = defaultdict(list)
        heads = [(n, tuple(head.get(w, w) for w in p)) for n, p in rows]
        for name, phrase in dict.fromkeys(heads):
            for w in phrase:
                self._by_word[w].append((name, phrase))
        self._alike = lru_cache(maxsize=50_000)(self._find_alike)
        self.find = lru_cache(maxsize=50_000)(self._find)

    def _find_alike(self, word: str) -> set[str]:
        """Lexicon words that `word` may stand for: inflections, else one typo."""
        near = [v for v in self._vocabulary if v == word or _inflected(word, v)]
        if not near and len(word) > 4:
            first = [v for v in self._vocabulary if v[0] == word[0]]
            near = [v for v in first if OSA.distance(word, v, score_cutoff=1) <= 1]
        return {self._head.get(v, v) for v in near}

    def _find(self, text: str) -> tuple[str, ...]:
        """Names of the symptoms that `text` mentions, in its order; () if none."""
        sentences = re.split(r"(?<=[?.!])\s+", text)
        asked = " ".join(p for p in sentences if p.endswith("?"))
        return self._own.get(_key(text)) or self._find_in(asked) or self._find_in(text)

    def _find_in(self, text: str) -> tuple[str, ...]:
        # A text has parts, between commas and joining words. Each part means the phrase
        # that has most words in it; a phrase may reach into the next part ("bleeding
        # from the gums or the nose").
        said = [(n, w) for n, p in enumerate(_PARTS.split(text)) for w in words(p)]
        said = [(n, w) for n, w in said if w not in _ENGLISH["stop_words"]]
        where = defaultdict(lambda: defaultdict(list))  # phrase -> its words -> places
        for place, (_, word) in enumerate(said):
            for same in self._alike(word):
                for phrase in self._by_word[same]:
                    where[phrase][same].append(place)
        hits = []
        for (name, phrase), found in where.items():
            near = len(found) == len(phrase) and _closest([*found.values()])
            if near and len(near) == len(phrase):
                parts = {said[i][0] for i in near}
                gap = near[-1] - near[0] + max(parts) - min(parts) - len(phrase)
                worth = len(phrase) - 1.2 * (len(parts) > 1)  # then the longest text
                longest = sum(len(said[i][1]) for i in near)
                hits += [(-worth, -longest, name, parts)] if gap <= 2 else []
        meant: dict[int, str] = {}  # part -> symptom
        for *_, name, parts in sorted(hits, key=lambda hit: hit[:3]):
            for part in parts:
                if meant.setdefault(part, name) in self._kinds[name]:
                    meant[part] = name
        return tuple(dict.fromkeys(name for _, name in sorted(meant.items()) if name))


def _inflected(a: str, b: str) -> bool:
    """Whether two words differ by an English ending: cough, coughs, coughing."""
    short, long = sorted((a, b), key=len)
    stem = short[:-1] if short[-1] in "ey" and len(short) > 4 else short
    alike = len(short) > 2 and long.startswith(stem)
    return alike and long[len(stem) :] in _ENGLISH["endings"]


def _closest(spots: list[list[int]]) -> list[int]:
    """One place for each word of a phrase, as near to the first word's as possible."""
    near = [sorted({min(s, key=lambda x: abs(x - b)) for s in spots}) for b in spots[0]]
    return min(near, key=lambda c: (-len(c), c[-1] - c[0]))


# ------------------------------------------------------------- 3. the disease bank (02)
# One disease of the file (data/README.md); `findings` are {symptom: share of patients}.
_FIELDS = "name findings aliases system icd10 onset severity prevalence red_flags"
_USUAL = (), "other", "", "days", "moderate", "common", (), "", "", (18, 80)
Disease = namedtuple("Disease", f"{_FIELDS} source sex age", defaults=_USUAL)
_SHORT = dict(disease_name="name", body_system="system", typical_onset="onset")


class Bank:
    """The diseases with their lexicon; a probability model of patients.

    Arrays [diseases, symptoms]: `listed`, the file's fractions; `rates`, P(finding |
    disease), never 0 or 1; `complaint_rates`, P(chief complaint | disease), rows sum to
    1: a complaint is typical (0.5 or more) of this disease and of another one.
    """

    BACKGROUND = 0.02  # P(a patient reports a symptom that the disease does not list)

    def __init__(self, diseases: Sequence[Disease], lexicon: Lexicon):
        self.diseases, self.lexicon = tuple(diseases), lexicon
        self.names = [d.name for d in diseases]
        self.index = {n: i for i, n in enumerate(self.names)}
        used = {s for d in diseases for s in d.findings}
        self.symptoms = [s for s in lexicon.symptoms if s in used]
        self.column = {s: i for i, s in enumerate(self.symptoms)}
        listed = [[d.findings.get(s, 0.0) for s in self.symptoms] for d in diseases]
        self.listed = np.array(listed)
        self.rates = np.clip(self.listed, self.BACKGROUND, 1 - self.BACKGROUND)
        typical = self.listed >= 0.5
        shared = typical & (typical.sum(0) >= 2)
        shared |= typical & ~shared.any(1, keepdims=True)  # in a part of a bank
        weight = shared * self.listed
        self.complaint_rates = (1 - self.BACKGROUND) * (weight / weight.sum(1)[:, None])
        self.complaint_rates += self.BACKGROUND / len(self.symptoms)
        said = [(_key(a), d.name) for d in diseases for a in (d.name, *d.aliases)]
        self.spellings = {spelling: name for spelling, name in said if spelling}
        # The lexicon's sentences give nothing away: "a cold sweat" is no common cold.
        harmless = " | ".join(f" {said} " for said in lexicon.sentences)
        self._giveaways = defaultdict(list)
        for said, name in ((f" {s} ", n) for s, n in self.spellings.items()):
            self._giveaways[name] += [said] if said not in harmless else []

    def __getitem__(self, name: str) -> Disease:
        return self.diseases[self.index[name]]

    def named_in(self, text: str, disease: str) -> bool:
        """Whether a text says the disease's name or one of its aliases."""
        said = f" {_key(text)} "
        return any(name in said for name in self._giveaways[disease])


def load_bank(
    source: str | Path | list[dict] | None = None,
    lexicon: str | Path | Lexicon = DATA / "symptoms.json",
) -> Bank:
    """Reads and checks a disease bank; `bank["Influenza"].findings` is a mapping.

    `source`: a file or a list of diseases as in data/README.md; None is the shipped
    bank. `lexicon`: how people talk about symptoms. InputError: what is wrong, where.
    """
    if not isinstance(lexicon, Lexicon):
        raw = _check(read_json(lexicon), "lexicon", str(lexicon))
        symptoms = [Symptom(name, **entry) for name, entry in raw["symptoms"].items()]
        lexicon = Lexicon(symptoms, raw.get("unknown", ()), raw.get("synonyms", ()))
    where, records = "this bank", source
    if not isinstance(source, list):
        where = source or DATA / "disease_bank.json"
        records = read_json(where)
    if not isinstance(records, list) or not records:
        what = "expected a non-empty list of diseases. (DDXPlus's files: notebook 02.)"
        raise InputError(f"{where}: {what}")
    owner, by_typical = {}, {}  # a name -> disease; its typical findings -> disease
    for number, record in enumerate(records, 1):
        name = record.get("disease_name") if isinstance(record, dict) else None
        here = f"{where}: {name or f'disease {number}'}"
        given = {
            _SHORT.get(k, k): v for k, v in _check(record, "disease", here).items()
        }
        found = {s: float(x) for s, x in given.pop("symptoms").items() if x}
        d, fault = Disease(findings=found, **given), ""
        typical = frozenset(s for s, share in found.items() if share >= 0.5)
        if (twin := by_typical.setdefault(typical, d)) is not d:
            fault = f"its typical findings (0.5 or more) are the same as {twin.name}'s."
            fault += " Add a finding that differs."
        for spelling in filter(_key, (d.name, *d.aliases)):
            if (first := owner.setdefault(_key(spelling), d)) is not d:
                fault = f"the name '{spelling}' is already used by {first.name}. Remove"
                fault += " one of the two, or rename it."
        for symptom in [s for s in found if s not in lexicon.symptoms]:
            fault = f"unknown symptom '{symptom}'."
            fault += _did_you_mean(symptom, lexicon.symptoms)
            fault += " Otherwise add it to the lexicon (data/symptoms.json)."
        if d.age[0] > d.age[1]:
            fault = "'age': give [youngest, oldest] in years."
        if fault:
            raise InputError(f"{here}: {fault}")
    for typical, d in by_typical.items():
        if not any(typical & other for other in by_typical if other != typical):
            what = f"{where}: {d.name}: no typical finding is shared with another"
            what += " disease, so its complaint gives it away. Add a shared one."
            raise InputError(what)
    return Bank([*by_typical.values()], lexicon)


def split_bank(bank: Bank, withheld=0.2, seed=0) -> tuple[list[str], list[str]]:
    """(training, withheld) disease names: of each body system the same share is
    withheld, rounded; at least one disease in all."""
    rng, systems, out = np.random.default_rng(seed), defaultdict(list), set()
    for d in bank.diseases:
        systems[d.system].append(d.name)
    for _, names in sorted(systems.items()):
        out |= set(rng.permutation(names)[: round(withheld * len(names))].tolist())
    if withheld and not out:  # only small systems: one of all diseases
        out = {str(rng.choice(bank.names))}
    return [n for n in bank.names if n not in out], [n for n in bank.names if n in out]


# ------------------------------------------------------------------------ 4. cases (02)
# One patient: a Disease, the chief complaint, a frozenset of findings, facts to tell.
Case = namedtuple("Case", "case_id disease complaint findings age sex since")


def make_case(bank: Bank, case_id: str) -> Case:
    """Rebuilds a case from its id, "disease|mode|seed": the same on any machine.

    canonical: the typical findings (0.5 or more). sampled: first the complaint, then
    each finding by its rate, as Bayes' rule has it (02). noisy: then 1 in 10 flipped.
    ValueError for a malformed id, an unknown disease or mode.
    """
    form = "disease|mode|seed: a known disease; sampled, canonical or noisy; digits"
    hit = re.fullmatch(r"(.+)\|(sampled|canonical|noisy)\|([0-9]{1,18})", str(case_id))
    if not hit or hit[1] not in bank.index:
        raise ValueError(f"case id {case_id!r:.80}: expected {form}.")
    name, mode, seed = hit.groups()
    row, disease = bank.index[name], bank[name]
    rng = np.random.default_rng([int(seed), zlib.crc32(f"{name}|{mode}".encode())])
    typical, canonical = bank.listed[row] >= 0.5, mode == "canonical"
    total = (bank.complaint_rates[row] * (typical if canonical else 1)).cumsum()
    first = int(total.searchsorted(rng.random() * total[-1], side="right"))
    present = typical if canonical else rng.random(len(typical)) < bank.rates[row]
    if mode == "noisy":
        present ^= rng.random(len(present)) < 0.1
    present[first] = True
    findings = frozenset(bank.symptoms[i] for i in np.flatnonzero(present))
    sex = disease.sex or ("female", "male")[rng.integers(2)]
    sex = "female" if "heavy periods" in findings else sex
    age = int(rng.integers(disease.age[0], disease.age[1] + 1))
    since = str(rng.choice(_SINCE[disease.onset]))
    return Case(case_id, disease, bank.symptoms[first], findings, age, sex, since)


def sample_cases(names: Sequence[str], n: int, seed=0, mode="sampled") -> list[str]:
    """`n` case ids, the diseases drawn evenly (each once before any comes twice)."""
    rng = np.random.default_rng([seed, 7])
    order = [i for _ in range(-(-n // len(names))) for i in rng.permutation(len(names))]
    return [f"{names[i]}|{mode}|{seed * 10**6 + k}" for k, i in enumerate(order[:n])]


# ------------------------------------------------------------------ 5. the patient (03)
class ScriptedPatient:
    """Answers truthfully from its case. It never names the disease."""

    UNSURE, NOTHING_ELSE = "I'm not sure.", "No, nothing else."

    def __init__(self, bank: Bank, case: Case):
        self.bank, self.case = bank, case
        self._mentioned, self._volunteered = {case.complaint}, False

    def opening(self) -> str:
        return self.bank.lexicon.symptoms[self.case.complaint].complaint

    def reply(self, question: str) -> str:
        """The answer to one free question; yes and no answers echo the symptom."""
        lexicon, case = self.bank.lexicon, self.case
        if asked := lexicon.find(question):
            self._mentioned.update(asked)
            said = [lexicon.symptoms[s] for s in asked]
            return " ".join(s.yes if s.name in case.findings else s.no for s in said)
        said, who = f" {_key(question)} ", "woman" if case.sex == "female" else "man"
        topics = _ENGLISH["topics"].items()
        topic = next((t for t, ask in topics if any(f" {p} " in said for p in ask)), "")
        about = {"age": f"I am {case.age} years old.", "sex": f"I am a {who}."}
        if topic != "else":
            return (about | {"since": case.since}).get(topic, self.UNSURE)
        left = sorted(case.findings - self._mentioned)
        if not left or self._volunteered:  # one more finding, once
            return self.NOTHING_ELSE
        typical = max(left, key=lambda s: case.disease.findings.get(s, 0.0))
        self._volunteered = True
        return lexicon.symptoms[typical].complaint


def read_evidence(bank: Bank, question: str, reply: str) -> dict[str, bool]:
    """What a reply says of the patient now: {symptom: present}, {} if nothing can be
    read. The lexicon's sentences are read exactly, others clause by clause: what is
    denied (to the end of a list), doubted, over, past, or of other people."""
    lexicon, evidence, rest, lists = bank.lexicon, {}, [], _ENGLISH
    for sentence in re.split(r"(?<=[.!?])\s+", reply):
        if known := lexicon.sentences.get(_key(sentence)):
            evidence[known[0]] = known[1]
        elif words(sentence):
            rest.append(sentence.lower().replace(", and ", " & "))
    asked, negative, others = lexicon.find(question) if rest else (), False, False
    named, run = (), 0  # the clause before: "Fever: no."; items of a list that denies
    for stop, clause in re.findall(lists["clause"], " . ".join(rest)):
        said, found = words(clause), lexicon.find(clause)
        text, alike = f" {stop} {' '.join(said)} ", lists["speech"].items()
        has = {k for k, phrases in alike if any(f" {p} " in text for p in phrases)}
        new = stop not in lists["list_marks"] or (stop == "&" and run < 2)
        new = new or set(lists["new_clause"]) & {*said[:2]}
        denied = "deny" in has and "still" not in has
        negative = denied or "over" in has or (negative and not new)
        others = "others" in has or (others and not new)
        told = [(s, _key(p)) for s in found for p in lexicon.symptoms[s].ask if denied]
        whole = {s for s, p in told if f" {p} " in text and {*p.split()} & _DENY}
        if not found and "unsure" in has:  # "Not sure, I have no thermometer."
            evidence = dict.fromkeys(asked) | evidence
        elif not found and said and not others:  # an answer to the question?
            short = said[0] in lists["yes"] or set(said) <= set(lists["short_yes"])
            if (short or "deny" in has) and stop in (":", "?"):
                evidence |= dict.fromkeys(named, not denied)
            elif short or {"deny", "still"} & has:
                evidence = dict.fromkeys(asked, not denied) | evidence
                negative = negative and len(said) > 2  # "No, just a headache"
        elif not others and "unsure" not in has:  # "no appetite" is a complaint
            evidence = {s: not negative or s in whole for s in found} | evidence
        named, run = found or named, (run + bool(found)) * negative
    return {s: v for s, v in evidence.items() if s in bank.column and v is not None}


# ------------------------------------------------------------- 6. the consultation (03)
SYSTEM = "You are a doctor. Ask the patient one short question at a time, at most {n}. "
SYSTEM += "Then write: Final diagnosis: NAME"
FEEDBACK = "Feedback on your last consultation with this patient:"
LAST_TURN = "Please give your final diagnosis now."
_TAGS = re.compile(r"<(/?)\s*(?:reason|reasoning|think|thinking)\s*>", re.I)
# "Final diagnosis: NAME" where a sentence or line begins; group 2 is a "?" if it asks.
_FINAL = re.compile("".join(_ENGLISH["final_diagnosis"]))
_REASON = re.compile(_ENGLISH["reason"])  # what may follow the name
# One doctor turn: all of it, what is spoken, hidden thoughts, the diagnosis or None.
Turn = namedtuple("Turn", "text spoken reasoning diagnosis")


@lru_cache(maxsize=50_000)
def read_turn(text: str) -> Turn:
    """Splits a doctor's text. Reasoning may be nested or unclosed; it stays hidden, and
    so does all before an end tag without a start (the prompt has opened it)."""
    depth, last, spoken, hidden = 0, 0, [], []
    for tag in _TAGS.finditer(text):
        (hidden if depth else spoken).append(text[last : tag.start()])
        if tag[1] and not depth:
            hidden, spoken = hidden + spoken, []
        depth, last = max(depth + (-1 if tag[1] else 1), 0), tag.end()
    (hidden if depth else spoken).append(text[last:])
    said, thought = "\n".join(spoken), " ".join(" ".join(hidden).split())
    names = (_REASON.split(m[1])[0] for m in _FINAL.finditer(said) if not m[2])
    names = filter(None, (name.strip(" ,:.*_`\"'“”–—-") for name in names))
    return Turn(text, " ".join(said.split()), thought, next(names, None))


@dataclass
class Episode:
    """The record of a consultation, in plain types. The doctor sees `prompt_ids` first;
    in `completion_ids` its own tokens have `env_mask` 1."""

    case_id: str = ""
    truth: str = ""
    system: str = ""
    opening: str = ""
    turns: list[str] = field(default_factory=list)  # what the doctor wrote
    spoken: list[str] = field(default_factory=list)  # and what the patient heard of it
    replies: list[str] = field(default_factory=list)
    diagnosis: str | None = None
    matched: str | None = None  # the bank's name for it
    correct: bool = False
    ended: str | None = None  # "diagnosis", "no diagnosis", "too long", ...
    budget: int = MAX_QUESTIONS  # questions allowed
    questions: int = 0
    repeats: int = 0  # questions that only asked what was known
    not_understood: int = 0  # questions without a symptom
    evidence: dict[str, bool] = field(default_factory=dict)
    prompt_ids: list[int] = field(default_factory=list, repr=False)
    completion_ids: list[int] = field(default_factory=list, repr=False)
    env_mask: list[int] = field(default_factory=list, repr=False)

    # False if the patient failed or named its disease: no reward would be fair.
    scorable = property(lambda self: self.ended not in ("no answer", "leak"))


class Consultation(Episode):
    """An episode that goes on: a doctor and a patient take turns.

    `patient` has `opening()` and `reply(question)`; `chat` is notebook 03's ChatTokens,
    or None for doctors that speak text. Beyond `max_tokens` it ends undiagnosed. In the
    instructions, `system`, {n} is `max_questions`; a critic's `feedback` follows (10).
    Each finding asked for counts as a question; if more are asked for than are left, a
    case gives no answer.
    """

    def __init__(
        self,
        bank: Bank,
        patient: Any,
        chat: Any = None,
        max_questions: int = MAX_QUESTIONS,
        max_tokens: int = 2048,
        system: str = SYSTEM,
        feedback: str = "",
    ):
        case = getattr(patient, "case", None)  # a person has none
        names = (case.case_id, case.disease.name) if case else ("", "")
        super().__init__(*names, budget=max_questions)
        self.bank, self.patient, self.chat = bank, patient, chat
        self.max_tokens, complaint = max_tokens, patient.opening()[:_MAX_REPLY]
        self.opening = self._cue(complaint)
        self.evidence = read_evidence(bank, "", self.opening)
        self._known = set(self.evidence)  # what was complained of or asked
        system = system.format(n=max_questions) + (f". {FEEDBACK} " if feedback else "")
        self.prompt_ids = chat.prompt(system, self.opening, feedback) if chat else []
        self.system = system + feedback

    ids = property(lambda self: self.prompt_ids + self.completion_ids)  # all so far
    done = property(lambda self: self.ended is not None)

    def _cue(self, reply: str) -> str:
        cued = self.questions >= self.budget
        return f"{reply} {LAST_TURN}".lstrip() if cued else reply

    def _append(self, ids: Sequence[int], mask: int) -> None:
        self.completion_ids += ids
        self.env_mask += [mask] * len(ids)

    def _close(self, how: str) -> None:
        self.ended = how
        self._append(self.chat.closing(self.completion_ids) if self.chat else [], 0)

    def hear(self, said: str | Sequence[int]) -> Turn:
        """The doctor speaks: text, or token ids if the consultation has a `chat`."""
        if self.done:
            raise RuntimeError("This consultation has ended; start a new one.")
        text = said if isinstance(said, str) else self.chat.decode(said)
        if said is text:
            said = self.chat.encode(said) + self.chat.end_ids if self.chat else []
        self._append(said, 1)
        turn = read_turn(text)
        self.turns.append(text)
        self.spoken.append(turn.spoken)
        if turn.diagnosis is not None:
            self.diagnosis = turn.diagnosis
            self.matched = match_disease(self.bank, turn.diagnosis)
            self.correct = self.matched == self.truth
            self._close("diagnosis")
        elif self.questions >= self.budget:
            self._close("no diagnosis")
        else:
            asked = self.bank.lexicon.find(turn.spoken)
            self.questions += max(1, len(asked))  # several in one turn count as several
            self.not_understood += not asked
            self.repeats += bool(asked) and self._known.issuperset(asked)
            self._known.update(asked)
        return turn

    def answer(self, reply: str | None) -> None:
        """The patient answers the last question; None is no answer at all."""
        if reply is None:
            return self._close("no answer")
        if self.truth and self.bank.named_in(reply, self.truth):
            return self._close("leak")
        too_many = self.truth and self.questions > self.budget  # more than were left
        reply = self._cue("" if too_many else reply[:_MAX_REPLY])
        ids = self.chat.bridge(self.completion_ids, reply) if self.chat else []
        if len(self.completion_ids) + len(ids) >= self.max_tokens:
            return self._close("too long")
        self._append(ids, 0)
        self.replies.append(reply)
        said = read_evidence(self.bank, self.spoken[-1], reply)
        self.evidence |= said | self.evidence

    def step(self, said: str | Sequence[int]) -> None:
        """The doctor speaks, and the patient answers unless that was the end."""
        self.hear(said)
        if not self.done:
            self.answer(self.patient.reply(self.spoken[-1]))

    def record(self) -> Episode:
        """What is left of it when it is over."""
        return Episode(**{f.name: getattr(self, f.name) for f in fields(Episode)})


def save_transcripts(episodes: Sequence[Episode], path: str | Path) -> Path:
    """Writes one JSON object per episode and line; makes the folders it needs."""
    return _write(path, "\n".join(json.dumps(asdict(e)) for e in episodes))


def load_transcripts(path: str | Path) -> list[Episode]:
    """Reads what `save_transcripts` wrote; an InputError names file and line."""
    found = enumerate(read_json(path, lines=True), 1)
    return [Episode(**_check(x, "episode", f"{path}, line {n}")) for n, x in found]


# ------------------------------------------------------------------------- 7. play (03)
def play(
    doctor: Callable,
    bank: Bank,
    case_ids: Sequence[str],
    chat: Any = None,
    at_once: int = 256,
    patient: Callable[[Bank, Case], Any] = ScriptedPatient,
    feedback: Sequence[str] = (),
    **options,
) -> list[Episode]:
    """Plays the cases, `at_once` of them together; episode i belongs to case_ids[i].

    `doctor` gets the open consultations and returns what it says in each: text or token
    ids. `patient` makes a case's patient; those with `reply_all` are asked together.
    `feedback`: a critic's words for each case (10). `options` go to Consultation.
    """
    feedback = feedback or [""] * len(case_ids)
    if len(feedback) != len(case_ids):
        raise ValueError("feedback: give a text for each case, empty where none is.")
    episodes, todo = [], list(zip(case_ids, feedback))
    with tqdm(total=len(case_ids), desc="episodes", delay=5, leave=False) as bar:
        for start in range(0, len(case_ids), at_once):
            talks = []
            for case_id, remark in todo[start:][:at_once]:
                who = patient(bank, make_case(bank, case_id))
                talks.append(Consultation(bank, who, chat, feedback=remark, **options))
            live = talks
            while live:
                for talk, said in zip(live, doctor(live), strict=True):
                    talk.hear(said)
                asked = [talk for talk in live if not talk.done]
                who, said = [t.patient for t in asked], [t.spoken[-1] for t in asked]
                ask = getattr(who[0], "reply_all", None) if who else None
                one_by_one = (w.reply(x) for w, x in zip(who, said))
                replies = ask(who, said) if ask else one_by_one
                for talk, reply in zip(asked, replies, strict=True):
                    talk.answer(reply)
                bar.update(sum(talk.done for talk in live))
                live = [talk for talk in live if not talk.done]
            episodes += [talk.record() for talk in talks]
    return episodes


# ---------------------------------------------------------- 8. grading and rewards (03)
def match_disease(bank: Bank, text: str) -> str | None:
    """The disease that a diagnosis names, or None. Aliases count, and typos in a word
    unless two diseases are as near. Denials and choices ("flu or a cold") name
    nothing; brackets must not contradict the rest."""
    said, hedges, fillers = words(text), set(_ENGLISH["hedges"]), _ENGLISH["fillers"]
    find = bank.spellings.get
    while not (exact := find(" ".join(said))) and said and said[0] in fillers:
        said = said[1:]
    inside = re.search(r"\((.+?)\)", text)
    if inside and not exact:
        outer = match_disease(bank, text.replace(inside[0], " "))
        inner = match_disease(bank, inside[1])
        agrees = inner in (None, outer) and not hedges & set(words(inside[1]))
        return outer if agrees else None
    if exact or not said or hedges & set(said):
        return exact
    near = defaultdict(set)  # typos -> diseases; a quarter of a word may be wrong
    for spelling, name in bank.spellings.items():
        if len(target := spelling.split()) == len(said):
            typos = [OSA.distance(a, b) for a, b in zip(said, target)]
            if all(wrong <= len(b) // 4 for wrong, b in zip(typos, target)):
                near[sum(typos)].add(name)
    nearest = near[min(near, default=0)]
    return nearest.pop() if len(nearest) == 1 else None


# A reward of None: this episode cannot be scored; TRL leaves it out.
def reward_correct(episode: list[Episode], **_) -> list[float | None]:
    """1 for the right diagnosis, else 0."""
    return [float(e.correct) if e.scorable else None for e in episode]


def reward_repeats(episode: list[Episode], **_) -> list[float | None]:
    """-0.1 for every question that was already answered."""
    return [0 - 0.1 * e.repeats if e.scorable else None for e in episode]


def reward_no_diagnosis(episode: list[Episode], **_) -> list[float | None]:
    """-0.5 for an episode that ends without a diagnosis."""
    return [0 - 0.5 * (e.diagnosis is None) if e.scorable else None for e in episode]


# ------------------------------------------------------------------- 9. evaluation (05)
def evaluate(
    doctor: Callable, bank: Bank, case_ids: Sequence[str], chat: Any = None, **options
) -> tuple[dict[str, float], list[Episode]]:
    """Plays the cases (`options`: of `play`); returns the scores and the episodes.

    n counts the scorable episodes; accuracy has a 95% Wilson interval (low, high);
    questions, repeats and not_understood are means, no_diagnosis is a share.
    """
    episodes = play(doctor, bank, case_ids, chat, **options)
    scorable = [e for e in episodes if e.scorable]
    if not scorable:
        raise RuntimeError("No patient answered without naming its disease: no score.")
    n, right = len(scorable), sum(e.correct for e in scorable)
    interval = binomtest(right, n).proportion_ci(0.95, method="wilson")
    scores = dict(n=n, accuracy=right / n, low=interval.low, high=interval.high)
    for name in ("questions", "repeats", "not_understood"):
        scores[name] = sum(getattr(e, name) for e in scorable) / n
    silent = sum(e.diagnosis is None for e in scorable) / n
    return scores | dict(no_diagnosis=silent, unscorable=len(episodes) - n), episodes


def save_result(result: Mapping, path, command: str, seed: int, machine: str) -> Path:
    """Writes figures as JSON, with what they depend on; makes the folders it needs."""
    versions = {p: version(p) for p in ("torch", "transformers", "trl", "unsloth")}
    origin = dict(machine=machine, versions=versions, command=command, seed=seed)
    return _write(path, json.dumps({**result, "origin": origin}, indent=1))
