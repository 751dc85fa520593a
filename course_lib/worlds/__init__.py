"""The wing of miniature worlds: photographs, scenes, creatures, dolls, saliency, and the writers of the miniatures."""
