from api._hardware import *
