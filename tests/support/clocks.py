"""A clock that somebody sets while a program runs."""

# Run in a process, Python's clock jumps at every twentieth look at it: forth by up to two days, and
# back by up to one.
JUMPING = """
import random, time

chance, right, looks, offset = random.Random(), time.time, 0, 0.0

def jumping():
    global looks, offset
    looks += 1
    if looks % 20 == 0:
        offset = chance.uniform(-86400, 172800)
    return right() + offset

time.time = jumping
time.time_ns = lambda: int(jumping() * 1e9)
"""
