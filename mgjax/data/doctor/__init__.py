"""The data doctor: looks at a data set with the rules of training, and reports."""
