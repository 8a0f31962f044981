"""The terminal side of chat: everything here knows a screen or a keyboard, and nothing knows an engine.

live.py      rows at the bottom of the screen that are rewritten in place
markdown.py  an answer cut into blocks, and a block as text for the terminal; markdown_parser.py reads it
view.py      what shows an answer while it comes: screen.py on a terminal, pipe.py elsewhere
footer.py    the counts of an answer in words
keys.py      the keyboard and Ctrl+C while an answer comes
line_editor.py  the prompt between answers
complete.py  what Tab offers, and files that are inlined with @
commands/    /help, /think, /set and the others
"""
