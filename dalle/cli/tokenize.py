"""`dalle tokenize`."""

from dalle.cli.parsing import parse
from dalle.cli.progress import shown
from dalle.cli.train import report_skipped
from dalle.training.tokens import TokenizeConfig, tokenize


def main(argv: list[str]) -> int:
    config = parse(TokenizeConfig, "tokenize", argv)
    with shown("tokenize") as on_step:
        parts = tokenize(config, on_step=on_step)
    report_skipped(parts["train"].skipped, config.out)
    counts = ", ".join(f"{len(tokens.captions)} {part}" for part, tokens in parts.items())
    print(f"codes of {counts} images in {config.out}")
    return 0
