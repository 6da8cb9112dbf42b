"""Generation of images from prompts: sampling codes from a prior, and the pipeline around it."""
