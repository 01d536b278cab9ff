from __future__ import annotations

from django.db import models


class Item(models.Model):
    key = models.CharField(max_length=50, primary_key=True)

    class Meta:
        app_label = "django_shop"
