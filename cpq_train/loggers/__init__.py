"""Where the metrics of a run go: W&B and a CSV file, beside Lightning's own loggers."""

from cpq_train.loggers.csv_run import CSVRunLogger as CSVRunLogger
from cpq_train.loggers.start import StartLoggers as StartLoggers
from cpq_train.loggers.wandb_run import WandbRunLogger as WandbRunLogger
