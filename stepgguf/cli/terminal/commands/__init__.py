"""The /commands of a chat: one function each, which acts on a CommandTarget.

table.py         all of them, for /help, for Tab and for running a line
target.py        what they act on
answering.py     how it answers: /think, /set, /system, /tools, /json
conversation.py  what was said: /file, /regen, /undo, /save, /load, /export
counts.py        tokens and speeds: /stats, /context
"""
