"""Files as the model sees them: pictures and clips, decoded, turned upright, resampled, scaled and cropped."""
