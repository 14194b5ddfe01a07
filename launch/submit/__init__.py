"""``quartet submit``: the same verbs for the local machine, a Ray cluster, Kubernetes and Slurm.

``job.py`` says what is sent and what can be known of it, ``targets/`` holds one file per target,
``verbs.py`` is what a user calls. Nothing here imports torch; only the target that talks to Ray imports
ray, and only then.
"""
