from model.draft_tree import *
