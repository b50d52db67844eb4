from host.kv_entries import *
