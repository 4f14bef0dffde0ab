"""What a point of a cloud file is, how files of points are read, and whether they can be what they say."""
