"""Makes the episodes of a rollout: one turn of text, or turns with tools and environments, token by token.

Begin with ``episodes.py`` (the loop) and ``player.py`` (one episode). ``chat.py`` keeps an episode's tokens, ``parsing.py`` reads
calls, ``tools.py`` knows what may be called, ``calls.py`` calls it with a deadline, ``turns.py`` hands turns to the engine.
``workers.py`` starts the processes (``worker.py``) in which runs what a config names. In ``long_form.py`` an environment leads the
conversation; ``returns.py`` gives turns their own advantages.
"""
