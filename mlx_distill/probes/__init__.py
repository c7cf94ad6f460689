"""What is checked before anything long: by files while a run is prepared, with weights in its first minute.

readings.py  do tokenizers of one vocabulary split text alike?
turns.py     do teacher and student end a turn alike, and write chats alike?
widths.py    do the matrices hold the vocabulary, and how far are they padded?
room.py      is there room on the drive?
judging.py   does a teacher repeat itself, and does it know more than the untrained student?
longest.py   the largest batch that training can meet
step.py      one real step on it, of a student that is thrown away
stand_in.py  a model as large as a student that is yet to be cut out, for that step
probe.py     the last four put together, once a run: `probes.json`
"""
