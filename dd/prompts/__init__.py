"""Prompts and their sources. Each source is chosen by a file in conf/prompts/: caption files
(``captions``), COCO (``coco``), templates (``templates``), a language model (``llm``), a mixture
(``mixed``). The other modules process words."""
