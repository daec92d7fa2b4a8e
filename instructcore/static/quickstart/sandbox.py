"""Evaluates whitelisted expressions of quickstart_data for it, in a process of its own.

One line in, one line out: [expression in x and y, [[x, y], ...]] gives the list of values, or null.
"""

import json
import resource
import sys

for limit, value in (("AS", 1 << 28), ("CPU", 60), ("FSIZE", 0), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + limit), (value, value))
for line in sys.stdin:
    source, inputs = json.loads(line)
    try:
        f = eval("lambda x, y: " + source, {"__builtins__": {}, "max": max, "min": min})
        answer = json.dumps([f(x, y) for x, y in inputs])
    except Exception:
        answer = "null"
    print(answer, flush=True)
