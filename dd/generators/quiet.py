"""Advice of the libraries about optional packages, and their bars for loading a few files, are not
shown. Imported before all that imports diffusers: it advises while it is imported."""

import diffusers
import transformers

for library in (diffusers, transformers):
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
