"""The terminal side of chat: everything here knows a screen or a keyboard, and nothing knows an engine.

live.py      rows at the bottom of the screen that are rewritten in place
markdown.py  an answer cut into blocks, and a block as text for the terminal; markdown_parser.py reads it
view.py      the updates of an answer on the screen, or into a pipe
footer.py    counts in words
keys.py      the keyboard and Ctrl+C while an answer comes
prompt.py    the line editor between answers
complete.py  what Tab offers, and files that are inlined with @
commands.py  /help, /think, /set and the others
"""
