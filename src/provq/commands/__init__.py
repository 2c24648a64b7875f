"""The verbs in Python: what each command of the shell does, as a function of the same name."""
