"""Tool calls and reasoning: the forms in which models write them, parser, grammars, and prompts."""
