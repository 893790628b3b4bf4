"""From a pre-trained model to a task: data readers, the task table, training, prediction."""
