from cli.eval_report import *
