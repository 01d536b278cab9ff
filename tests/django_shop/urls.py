from __future__ import annotations

from django.urls import include, path, re_path

from django_shop import views

shop = [
    path("about/", views.about, name="about"),
    path("items/<slug:key>/", views.item, name="item"),
    path("aitems/<slug:key>/", views.aitem, name="aitem"),
    path("boom/<slug:key>/", views.boom, name="boom"),
    path("aboom/", views.aboom, name="aboom"),
    path("raise/<slug:what>/", views.raises, name="raise"),
    path("who/", views.who, name="who"),
    path("login/", views.log_in, name="login"),
    path("logout/", views.log_out, name="logout"),
    path("stream/", views.stream, name="stream"),
    path("astream/", views.astream, name="astream"),
    path("slow/", views.slow, name="slow"),
    path("file/", views.file, name="file"),
    path("upload/", views.upload, name="upload"),
    path("durable/", views.durable, name="durable"),
    path("context/", views.context, name="context"),
    path("pid/", views.pid, name="pid"),
    path("health/", views.Health.as_view(), name="health"),
    path("health/more/", views.MoreThanHealth.as_view(), name="more"),
    path("exempt/", views.exempt, name="exempt"),
]
urlpatterns = [
    path("api/", include((shop, "shop"))),
    path("unnamed/", views.about),
    re_path(r"^old/(?P<year>[0-9]{4})/$", views.about, name="old"),
]
