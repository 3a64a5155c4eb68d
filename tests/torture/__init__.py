"""The torture suite: each goal of 6.3 as one module with a command, a seed and a figure.

Knows which figures there are (`__main__.FIGURES`) and how a result looks. Does not know how any
figure is measured: each is a module `<code>_<subject>.py` with `run(scale, seed, folder)`.
"""
