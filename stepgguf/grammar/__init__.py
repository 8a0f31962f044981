"""Grammars in GBNF, which llama.cpp holds an answer to. Nothing here knows a chat or an engine.

    schema --schema, schema_keywords--> merged_schema --schema_rules, pattern, interval--> gbnf

json_grammar.py  JSON itself, which the grammars of schemas refer to
user_grammar.py  a grammar that the user brings; ambiguity.py tells whether it is too much work
"""
