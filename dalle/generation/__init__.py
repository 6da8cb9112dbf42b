"""From captions to pictures: drawing codes with a prior, and the pipeline around it."""
