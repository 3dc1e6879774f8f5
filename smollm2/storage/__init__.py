"""Where checkpoints lie and how they stay whole: saving in the background, keeping and removing, locks, the copy on Drive."""
