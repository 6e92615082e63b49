"""Starts a command three times and says the least wall time."""

import json
import subprocess
import sys
import time

times = []
for _ in range(3):
    began = time.perf_counter()
    subprocess.run(sys.argv[1:], check=True, capture_output=True)
    times.append(time.perf_counter() - began)
print(json.dumps({"s": min(times)}))
