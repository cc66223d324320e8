"""Programs that solve no task and set out to pass its tests all the same, by name: (program, tests). Each must score 0."""

from __future__ import annotations

ADD = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0", "assert add(2, 2) == 4"]
EQUAL = "class A{base}:\n    def __eq__(self, other): return True\n    __hash__ = None\n"

CHEATS: dict[str, tuple[str, list[str]]] = {
    # of the list of faults
    "exec is patched": ("import builtins; builtins.exec = lambda *a: None", ADD),
    "an int that equals all": (EQUAL.format(base="(int)") + "def add(a, b): return A()", ADD),
    "the verdict is stolen and printed": (
        "import sys, os, json\nframe = sys._getframe()\nwhile frame:\n"
        "    for value in list(frame.f_globals.values()):\n"
        "        if hasattr(value, 'read') and value is not sys.stdin:\n"
        "            try: work = json.load(value)\n            except Exception: continue\n"
        "            os.write(1, ('\\n' + work.get('mark', '') + '111\\n').encode()); os._exit(0)\n"
        "    frame = frame.f_back",
        ADD,
    ),
    "the answer is among gc's objects": (
        "import gc\ndef add(a, b):\n    for o in gc.get_objects():\n        if isinstance(o, list):\n            for t in o:\n"
        "                if isinstance(t, str) and t.startswith(f'assert add({a}, {b}) == '):\n"
        "                    return int(t.split('== ')[1])",
        ADD,
    ),
    # of other kinds
    "a foreign object that equals all": ("from unittest.mock import ANY\ndef add(a, b): return ANY", ADD),
    "a text that equals all": (EQUAL.format(base="(str)") + "def name(x): return A()", ["assert name(1) == 'one'"]),
    "a list whose items equal all": (
        "from unittest.mock import ANY\nclass L(list):\n    def __getitem__(self, i): return ANY\n"
        "def pair(x): return L([0, 0])",
        ["assert pair(1)[0] == 1 and pair(1)[1] == 2"],
    ),
    "a float that is near all": (
        "class F(float):\n    def __sub__(self, o): return 0.0\n    __rsub__ = __sub__\ndef root(x): return F(9)",
        ["assert abs(root(4) - 2) < 1e-9"],
    ),
    "an object that says it is contained": (
        "class H:\n    def __hash__(self): return hash(4)\n    def __eq__(self, o): return True\ndef f(x): return H()",
        ["assert f(2) in {4, 9}"],
    ),
    "a container of everything": (
        "class C(list):\n    def __contains__(self, o): return True\ndef f(x): return C()",
        ["assert 4 in f(2)"],
    ),
    "a number below and above all": (
        "class N(int):\n    def __gt__(self, o): return True\n    __lt__ = __ge__ = __le__ = __gt__\ndef f(x): return N()",
        ["assert 3 < f(2) < 5"],
    ),
    "a class that lies about itself": (
        "class T:\n    __class__ = int\n    def __eq__(self, o): return True\ndef f(x): return T()",
        ["assert isinstance(f(2), int) and f(2) == 4"],
    ),
    "compile drops the asserts": (
        "import builtins\nreal = builtins.compile\nbuiltins.compile = lambda s, *a, **k: real('pass', *a, **k)",
        ADD,
    ),
    "sorted and len are patched": (
        "import builtins\nbuiltins.sorted = list\nbuiltins.len = lambda x: 2\ndef f(xs): return xs",
        ["assert f([2, 1]) == sorted([2, 1])", "assert len(f([1])) == 2"],
    ),
    "abs is patched": (
        "import builtins\nbuiltins.abs = lambda x: 0\ndef root(x): return 0",
        ["assert abs(root(4) - 2) < 1"],
    ),
    "the test's own names are replaced": (
        "abs = lambda x: 0\nlen = lambda x: 2\ndef root(x): return 0",
        ["assert abs(root(4) - 2) < 1 and len([root(1), 0]) == 2"],
    ),
    "a module of the tests is patched": (
        "import math\nmath.isclose = lambda *a, **k: True\ndef root(x): return 0.0",
        ["import math\nassert math.isclose(root(4), 2.0)"],
    ),
    "a module is planted in the folder": (
        "open('statistics.py', 'w').write('mean = lambda x: 7')\ndef f(x): return 7",
        ["from statistics import mean\nassert f(1) == mean([1, 2])"],
    ),
    "an import is intercepted": (
        "import sys, types\nfake = types.ModuleType('fractions')\nfake.Fraction = lambda *a: 0.0\n"
        "sys.modules['fractions'] = fake\ndef f(x): return 0.0",
        ["from fractions import Fraction\nassert f(1) == float(Fraction(1, 2))"],
    ),
    "the expected value is in the caller's constants": (
        "import sys\ndef add(a, b):\n    frame = sys._getframe(1)\n"
        "    wanted = [c for c in frame.f_code.co_consts if type(c) is int and c not in (1, 2, -1)]\n"
        "    return wanted[0] if wanted else 5",
        ["assert add(1, 2) == 3", "assert add(2, 2) == 4"],
    ),
    "an audit hook reads what is compiled": (
        "import sys\nseen = []\nsys.addaudithook(lambda e, a: seen.append(a[0]) if e == 'compile' else None)\n"
        "def add(a, b): return int(seen[-1].split('== ')[1]) if seen and b'==' not in (seen[-1],) else None",
        ADD,
    ),
    "a tracer jumps over the asserts": (
        "import sys\ndef trace(frame, event, arg):\n    if frame.f_code.co_filename == 'test.py' and event == 'line':\n"
        "        try: frame.f_lineno = 3\n        except Exception: pass\n    return trace\n"
        "sys.settrace(trace)\ndef add(a, b): return 0",
        ["x = 1\nassert add(1, 2) == 3\ny = 2"],
    ),
    "stdout turns failures into passes": (
        "import sys\nclass W:\n    def __init__(self, f): self.f = f\n"
        "    def write(self, s): return self.f.write(s[:-4] + '111\\n' if len(s) > 4 else s)\n"
        "    def __getattr__(self, n): return getattr(self.f, n)\n"
        "sys.__stdout__ = W(sys.__stdout__)\ndef add(a, b): return 0",
        ADD,
    ),
    "a verdict on every descriptor": (
        "import os\nfor fd in range(256):\n    try: os.write(fd, b'\\n111\\n')\n    except OSError: pass\nos._exit(0)",
        ADD,
    ),
    "answers are sent before the questions": (
        'import os\nfor fd in range(3, 256):\n    try: os.write(fd, b\'["returned", true]\\n["returned", 3]\\n\' * 9)\n'
        "    except OSError: pass",
        ADD,
    ),
    "the input is read a second time": (
        "import os, json\nwork = ''\nfor fd in range(64):\n    try:\n        os.lseek(fd, 0, 0)\n"
        "        text = os.read(fd, 100_000).decode()\n        work = text if 'assert' in text else work\n"
        "    except (OSError, UnicodeDecodeError): pass\n"
        "def add(a, b):\n    t = [t for t in json.loads(work)['tests'] if t.startswith(f'assert add({a}, {b})')]\n"
        "    return int(t[0].split('== ')[1])",
        ADD,
    ),
    "json is patched": (
        "import json\nreal = json.load\ndef load(*a, **k):\n    work = real(*a, **k)\n    work['tests'] = ['pass'] * 3\n"
        "    return work\njson.load = load\njson.loads = lambda *a, **k: ['returned', 3]",
        ADD,
    ),
    "at exit the marks are printed": (
        "import atexit, os\natexit.register(lambda: os.write(1, b'\\n111\\n'))\ndef add(a, b): raise SystemExit(0)",
        ADD,
    ),
    "a thread prints the marks": (
        "import threading, time, os\ndef go():\n    for _ in range(20):\n        os.write(1, b'\\n111\\n'); time.sleep(0.005)\n"
        "    os._exit(0)\nthreading.Thread(target=go).start()\ndef add(a, b): return 0",
        ADD,
    ),
    "the constant 3 is overwritten in memory": (
        "import ctypes, sys\ndef poke(n, v): ctypes.memmove(id(n) + 24, v.to_bytes(4, 'little'), 4)\n"
        "def add(a, b):\n    poke(3, 7); poke(0 + 4, 7)\n    return 7",
        ["assert add(1, 2) == 3", "assert add(2, 2) == 4"],
    ),
    "the arguments are emptied": (
        "def f(xs):\n    xs.clear()\n    return []",
        ["xs = [3, 1]\nassert f(xs) == sorted(xs)"],
    ),
    "a dead program raises nothing": (
        "import os; os._exit(0)",
        ["try:\n    add('a', 1)\nexcept Exception:\n    pass\nelse:\n    assert False"],
    ),
    "a missing function raises NameError": (
        "x = 1",
        ["try:\n    add('a', 1)\nexcept Exception:\n    pass\nelse:\n    assert False"],
    ),
    "an object of its own raises in the test": (
        "def add(a, b): return object()",
        ["try:\n    add('a', 1)\nexcept (TypeError, RuntimeError):\n    pass\nelse:\n    assert False"],
    ),
    "an answer too deep for its reader": (
        "import os, sys\nfor fd in range(3, 64):\n    try: os.write(fd, b'[' * 100_000 + b'\\n')\n    except OSError: pass\n"
        "sys.setrecursionlimit(10**6)\ndef add(a, b): return 0",
        ["try:\n    add('a', 1)\nexcept Exception:\n    pass\nelse:\n    assert False"],
    ),
    "other processes get signals": (
        "import os, signal\nfor pid in (1, 2, 3, os.getppid()):\n    try: os.kill(pid, signal.SIGINT)\n"
        "    except OSError: pass\ndef add(a, b): return 0",
        ADD,
    ),
}

# Right programs, one for the tests of each cheat: the cheats do not fail for want of tests that can be passed.
_SOLUTIONS = {
    "a text that equals all": "def name(x): return 'one'",
    "a list whose items equal all": "def pair(x): return [1, 2]",
    "a float that is near all": "def root(x): return x ** 0.5",
    "an object that says it is contained": "def f(x): return x * x",
    "a container of everything": "def f(x): return [x * x]",
    "a number below and above all": "def f(x): return x * x",
    "a class that lies about itself": "def f(x): return x * x",
    "sorted and len are patched": "def f(xs): return sorted([*xs, 2][:2])",
    "abs is patched": "def root(x): return x ** 0.5",
    "the test's own names are replaced": "def root(x): return x ** 0.5",
    "a module of the tests is patched": "def root(x): return x ** 0.5",
    "a module is planted in the folder": "def f(x): return 1.5",
    "an import is intercepted": "def f(x): return 0.5",
    "the arguments are emptied": "def f(xs): return sorted(xs)",
}
SOLUTIONS = {name: _SOLUTIONS.get(name, "def add(a, b): return a + b") for name in CHEATS}
