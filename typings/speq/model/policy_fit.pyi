from model.policy_fit import *
