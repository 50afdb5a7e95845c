from saccade.train.lab import Lab as Lab
