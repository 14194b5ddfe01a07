"""Foresight: what a run needs and how fast it will be, before anything is rented. No torch, no Ray, no
device.

    devices.py   data sheets and the cluster "4x8xH200"
    shapes.py    a model's sizes from its config.json
    memory.py    bytes of one worker of each role         fit.py   the same on devices, and what makes it fit
"""
