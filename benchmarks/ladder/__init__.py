"""Local updates with codecs, on banks and on dense models: agreement of the workers, and loss at equal steps against bytes."""
