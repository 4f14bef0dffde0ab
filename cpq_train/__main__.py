"""`python -m cpq_train VERB`."""

from cpq_train.verbs.cli import main

if __name__ == "__main__":
    main()
