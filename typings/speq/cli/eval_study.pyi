from cli.eval_study import *
