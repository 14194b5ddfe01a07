"""``quartet bench``: every phase alone, the whole step, the driver, and how they scale; results as JSON.

A suite is one file with ``measure(settings) -> list[Figure]``; ``main.py`` runs the suites, ``result.py``
says what a result file holds and which of two differ, ``simulated.py`` has roles that only take their time.
"""
