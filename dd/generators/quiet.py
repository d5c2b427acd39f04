"""Hides the libraries' advice about optional packages and their progress bars for loading a few
files. Imported before all that imports diffusers, which gives its advice during the import."""

import diffusers
import transformers

for library in (diffusers, transformers):
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
