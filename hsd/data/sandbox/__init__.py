"""Model code runs here, and only here.

`local` is what the rest of the program calls. What it starts runs alone, in an isolated
interpreter that imports this package and the standard library only: `launcher` (starts, watches,
kills), `jail` and `seccomp` (what the kernel is asked for), `harness` (the tests), `candidate` (the
model's program), `wire` (how those two talk).
"""
