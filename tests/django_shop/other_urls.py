"""What the path of an excluded view means to a tenant: something else."""

from __future__ import annotations

from django.urls import include, path

from django_shop import views

shop = [path("about/", views.pid, name="tenant")]
urlpatterns = [path("api/", include((shop, "shop")))]
