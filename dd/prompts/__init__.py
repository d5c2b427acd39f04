"""Prompts. Their sources, each chosen by a file in conf/prompts/: caption files (``captions``),
COCO (``coco``), templates (``templates``), a language model (``llm``), several (``mixed``). The
other modules read words."""
