"""Makes the episodes of a rollout: one turn of text, or turns with tools and environments, token by token.

Begin with ``episodes.py`` (the loop) and ``player.py`` (one episode). ``chat.py`` writes tokens with a chat template, which
``transitions.py`` tries before; ``conversation.py`` keeps an episode's tokens, ``parsing.py`` reads calls, ``tools.py`` knows what
may be called, ``calls.py`` calls it with a deadline, ``turns.py`` hands turns to the engine. What a config names runs in processes
(``worker.py``) that ``workers.py`` starts and ``remote.py`` calls. In ``long_form.py`` an environment leads the conversation;
``returns.py`` gives turns their own advantages.
"""
