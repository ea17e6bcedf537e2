"""What does a turn of many language-model patients cost? Asks one patient, then all of
them at once, through a local server that takes `--latency` seconds for each answer.
Prints, as the last line, one JSON object.

    python tests/bench/llm_patients.py --patients 64 --latency 0.2
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import grpodx_utils as gx

eight, nine = gx.notebook("08b"), gx.notebook("09")

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--patients", type=int, default=64)
parser.add_argument("--latency", type=float, default=0.2)
parser.add_argument("--rounds", type=int, default=5)
args = parser.parse_args()

script = Path(__file__).resolve().parents[1] / "chat_server.py"
command = [sys.executable, str(script), "--port", "0", "--latency", str(args.latency)]
server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
try:
    client = eight.ChatServer(base_url=server.stdout.readline().strip(), api_key="none")
    client.check()
    bank, times = gx.load_bank(), {1: [], args.patients: []}
    for turn in range(args.rounds):
        for many, seconds in times.items():
            ids = gx.sample_cases(bank.names, many, seed=turn)
            patients = [
                nine.LLMPatient(bank, gx.make_case(bank, c), client) for c in ids
            ]
            start = time.perf_counter()
            replies = nine.LLMPatient.reply_all(
                patients, ["Do you have a fever?"] * many
            )
            seconds.append(time.perf_counter() - start)
            assert None not in replies
finally:
    server.terminate()
    server.wait()
one, many = (float(np.median(times[n])) for n in (1, args.patients))
result = {
    "bench": "llm_patients",
    "patients": args.patients,
    "latency_s": args.latency,
    "one_s": round(one, 3),
    "all_s": round(many, 3),
    "ratio": round(many / one, 2),
}
print(json.dumps(result))
