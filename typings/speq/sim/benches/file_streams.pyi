from sim.benches.file_streams import *
