"""The folder of a run: who may write into it, what lies in it for people, its page, and runs beside each other."""
