"""`python -m cpq_train VERB`, and the command `cpq_train`."""

from cpq_train.common.signals import leave_signals, take_signals


def main() -> None:
    """Run the verb of the command line."""
    take_signals()  # the imports of a verb take seconds, in which SLURM may signal
    from cpq_train.verbs.cli import main as run

    try:
        run()
    finally:
        leave_signals()


if __name__ == "__main__":
    main()
