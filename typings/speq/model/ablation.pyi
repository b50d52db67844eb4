from model.ablation import *
