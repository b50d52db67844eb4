from sim.benches.rounder import *
