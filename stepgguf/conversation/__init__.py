"""A person's dialogue with a model: what was said, what comes, and the file that keeps it. No terminal in here.

session.py     questions and answers, over a ChatBackend: inprocess.py here, remote.py at a server
transcript.py  the file of a session, line by line; records.py says what the lines hold
export.py      the whole of it as one document
"""
