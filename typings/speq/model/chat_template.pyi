from model.chat_template import *
